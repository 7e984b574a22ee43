"""`qa-dist answer` and `qa-dist serve`."""

import contextlib
import json
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, TypeVar

import tyro

from qa_dist.errors import InputError, UserError

if TYPE_CHECKING:  # heavy imports wait until the options are known to be right
    from qa_dist.inference.question_answerer import QuestionAnswerer

LINES_AT_ONCE = 1024
"""Lines of questions that are answered together, where so many are there to be read."""
OWN_FIELDS = ("question", "context", "answers", "line", "error", "score", "start", "end", "answer", "windows")
"""Of a line of questions, those that are not passed on: they would be taken for the answer's."""
MOST_SECONDS = 86_400
"""That an answer of the server may take."""
LONG_CONTEXT = 300_000
"""Characters from which on an answer takes so long that one wants to be told."""

Say = Callable[[str], None]
Options = TypeVar("Options")


@dataclass
class ModelOptions:
    """Which model is asked, and how."""

    model: str
    """Model directory, run directory, or id on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    device: str | None = None
    """Such as cuda:1 or cpu; by default the accelerator, if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision that the model computes in."""
    batch_size: int | None = None
    """Windows that the model reads at once; by default 4 on a CPU and 32 elsewhere."""
    max_answer_length: int | None = None
    """Longest answer, in tokens; by default the model's own."""
    no_answer_threshold: float | None = None
    """Of SQuAD 2.0: no answer where its score exceeds the best answer's by more; by default the model's own."""
    compile: bool = False
    """Compile the model; worth its while from some thousand questions on."""
    trust_remote_code: bool = False
    """Run code that comes with the model's repository. Only for repositories whose code you have read."""

    def load(self) -> "QuestionAnswerer":
        import transformers

        from qa_dist.inference.question_answerer import QuestionAnswerer

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return QuestionAnswerer.from_pretrained(
            self.model,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            batch_size=self.batch_size,
            max_answer_length=self.max_answer_length,
            no_answer_threshold=self.no_answer_threshold,
            compile=self.compile,
        )


Answering = Annotated[ModelOptions, tyro.conf.OmitArgPrefixes]


@dataclass
class AnswerOptions:
    """Answer a question from a text, or many questions of a file."""

    answering: Answering
    question: str | None = None
    """The question."""
    context: str | None = None
    """The text that may answer it."""
    context_file: str | None = None
    """Instead: a file that holds the text; - for standard input."""
    input: str | None = None
    """Instead of one question: a file of JSON lines with question and context, - for standard input; each line gives a
    line of JSON with the answer and what else the line held (but for fields of the
    answer's names). Lines that cannot be answered give one with the error."""
    top_k: int = 1
    """Number of answers, best first."""
    json: bool = False
    """Print the answers to one question as JSON."""


@dataclass
class ServeOptions:
    """Serve a page to ask the model on, and POST /answer for programs."""

    answering: Answering
    host: str = "127.0.0.1"
    """Address to listen on. Other machines reach only what is not a loopback address; there is no password."""
    port: int = 8000
    """Port to listen on; 0 for any that is free."""
    max_characters: int = 200_000
    """Longest question and context of a request, together."""
    timeout: float = 60.0
    """Seconds that an answer may take."""


def answer(args: Sequence[str], show: Say, say: Say) -> int:
    """`qa-dist answer`. `show` gets the answers, `say` what is remarked on them. Exit code 2 if a line of a file of
    questions could not be answered; raises `UserError` for one question."""
    options = _parse(AnswerOptions, "answer", args)
    if options.input is not None:
        if options.question is not None or options.context is not None or options.context_file is not None:
            raise UserError("--input: names the questions and contexts; leave out --question and --context")
        return _answer_lines(options, options.input, show, say)
    if options.question is None:
        raise UserError("--question: is not set; ask one, or name a file of questions (--input)")
    if (options.context is None) == (options.context_file is None):
        raise UserError(
            "--context_file: name a file with the text (or -), or give the text with --context; one of both"
        )
    context = options.context if options.context_file is None else _read_text(options.context_file)
    assert context is not None
    from qa_dist.inference.question_answerer import text_problem

    if problem := text_problem(options.question, context):
        raise InputError(f"{problem}{f' ({options.context_file})' if options.context_file else ''}")
    answerer = options.answering.load()
    if len(context) > LONG_CONTEXT:
        say(f"reading {len(context):,} characters; this takes a while")
    result = answerer(options.question, context, top_k=options.top_k)
    answers = result if isinstance(result, list) else [result]
    if options.json:
        show(json.dumps(result, ensure_ascii=False, indent=2))
        return 0
    for found in answers:
        text = "".join(c if c.isprintable() else " " for c in found["answer"])  # no commands to the terminal
        text = " ".join(text.split()) or "(no answer)"
        show(f"{found['score']:.3f}  {text}" + (f"  [{found['start']}:{found['end']}]" if found["answer"] else ""))
    return 0


def serve(args: Sequence[str], show: Say, say: Say) -> int:
    """`qa-dist serve`: until it is interrupted."""
    options = _parse(ServeOptions, "serve", args)
    if options.max_characters < 1:
        raise UserError(f"--max_characters: {options.max_characters} is less than 1")
    if not 0 < options.timeout <= MOST_SECONDS:
        raise UserError(f"--timeout: {options.timeout} is not a number of seconds from 0 to {MOST_SECONDS:,}")
    if not options.host:
        raise UserError("--host: is empty; name an address, such as 127.0.0.1")
    from qa_dist.inference.server import AnswerServer

    answerer = options.answering.load()
    with AnswerServer(
        answerer,
        options.answering.model,
        options.host,
        options.port,
        max_characters=options.max_characters,
        timeout=options.timeout,
        log=say,
    ) as server:
        if not server.is_local:
            say(f"{options.host} is reached from other machines, and there is no password")
        show(f"{server.url}  (Ctrl-C ends it)")
        server.serve_forever()
    return 0


def _parse(options: type[Options], command: str, args: Sequence[str]) -> Options:
    return tyro.cli(options, args=args, prog=f"qa-dist {command}", use_underscores=True)


def _read_text(name: str) -> str:
    try:
        data = _standard_input().read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"--context_file: {name}: {error.strerror or error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"--context_file: {name}: is not UTF-8 text: line {line} holds the byte 0x{data[error.start]:02x}; convert "
            "it (such as with iconv)"
        ) from None


def _standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise UserError("-: standard input is closed")
    return sys.stdin.buffer


# ------------------------------------------------------------------------------------------- files of questions


@dataclass
class _Line:
    number: int
    """In the file, from 1."""
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def _answer_lines(options: AnswerOptions, name: str, show: Say, say: Say) -> int:
    with contextlib.ExitStack() as stack:
        try:
            file = _standard_input() if name == "-" else stack.enter_context(Path(name).open("rb"))
        except OSError as error:
            raise UserError(f"--input: {name}: {error.strerror or error}") from None
        answerer = options.answering.load()
        count = failed = 0
        for lines in _at_hand(_read_lines(file)):
            for line, result in zip(lines, _results(answerer, lines, options.top_k), strict=True):
                count += 1
                own = {key: value for key, value in line.values.items() if key not in OWN_FIELDS}
                if line.error is None:
                    content = {"answers": result} if isinstance(result, list) else result
                else:
                    failed += 1
                    say(f"{name}, line {line.number}: {line.error}")
                    content = {"line": line.number, "error": line.error}
                show(json.dumps(own | content, ensure_ascii=False))
    if not count:
        raise UserError(f"--input: {name}: holds no line")
    if failed:
        say(f"{failed:,} of {count:,} lines could not be answered")
    return 2 if failed else 0


def _results(answerer: "QuestionAnswerer", lines: list[_Line], top_k: int) -> list[Any]:
    """The answers of each line, None for one with an error. Errors of single lines are noted in them."""
    good = [line for line in lines if line.error is None]

    def ask(some: list[_Line]) -> list[Any]:
        return answerer([(line.values["question"], line.values["context"]) for line in some], top_k=top_k)

    answers: list[Any] = []
    try:
        answers = ask(good)
    except UserError:  # one of them leaves no room for its context: which, is seen one by one
        for line in good:
            try:
                answers += ask([line])
            except UserError as error:
                line.error = str(error)
                answers.append(None)
    found = iter(answers)
    is_good = {id(line) for line in good}
    return [next(found) if id(line) in is_good else None for line in lines]


def _read_lines(file: BinaryIO) -> Iterator[_Line]:
    from qa_dist.inference.question_answerer import text_problem

    for number, data in enumerate(file, 1):
        line = _Line(number)
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text:
                continue
            values = json.loads(text)
            if isinstance(values, dict):
                line.values = values
                line.error = text_problem(values.get("question"), values.get("context"))
            else:
                line.error = "is not a JSON object with question and context"
        except UnicodeDecodeError as error:
            line.error = f"is not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start})"
        except (ValueError, RecursionError) as error:
            line.error = f"is not JSON: {error}"
        yield line


def _at_hand(lines: Iterable[_Line]) -> Iterator[list[_Line]]:
    """`lines` as they come: those that have been read while others were answered, together. So a file is answered in
    large parts, and a program that waits for each answer before it asks on is not kept waiting."""
    waiting: queue.Queue[_Line | Exception | None] = queue.Queue(LINES_AT_ONCE)

    def read() -> None:
        try:
            for line in lines:
                waiting.put(line)
            waiting.put(None)
        except Exception as error:  # told where the lines are used
            waiting.put(error)

    threading.Thread(target=read, daemon=True).start()
    ended = False
    while not ended:
        batch = [waiting.get()]
        while len(batch) < LINES_AT_ONCE and not waiting.empty():
            batch.append(waiting.get())
        if isinstance(last := batch[-1], Exception):
            raise last
        ended = last is None
        if found := [line for line in batch if isinstance(line, _Line)]:
            yield found
