"""`qa-dist answer`, `qa-dist tag` and `qa-dist serve`."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import tyro

from qa_dist.errors import InputError, UserError
from qa_dist.inference.lines import Asking, answer_lines
from qa_dist.inference.options import AnswerOptions, ServeOptions, TagOptions

# what of a line is not passed on: what was asked, and what would be taken for the answer
ANSWER_FIELDS = frozenset({"question", "context", "answers", "score", "start", "end", "answer", "windows"})
TAG_FIELDS = frozenset({"text", "tokens", "ner_tags", "entities"})
MOST_SECONDS = 86_400
"""That an answer of the server may take."""
LONG_CONTEXT = 300_000
"""Characters from which on an answer takes so long that one wants to be told."""

Say = Callable[[str], None]
Options = TypeVar("Options")


def answer(args: Sequence[str], show: Say, say: Say) -> int:
    """`qa-dist answer`. `show` gets the answers, `say` what is remarked on them. Exit code 2 if a line of a file of
    questions could not be answered; raises `UserError` for one question."""
    options = _parse(AnswerOptions, "answer", args)
    if options.input is not None:
        if options.question is not None or options.context is not None or options.context_file is not None:
            raise UserError("--input: names the questions and contexts; leave out --question and --context")
        return _answer_file(options, options.input, show, say)
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
        text = _printable(found["answer"]) or "(no answer)"
        show(f"{found['score']:.3f}  {text}" + (f"  [{found['start']}:{found['end']}]" if found["answer"] else ""))
    return 0


def _answer_file(options: AnswerOptions, name: str, show: Say, say: Say) -> int:
    from qa_dist.inference.question_answerer import text_problem

    with _opened(name) as file:
        answerer = options.answering.load()

        def ask(lines: list[dict[str, Any]]) -> list[dict[str, Any] | UserError]:
            results = answerer([(line["question"], line["context"]) for line in lines], top_k=options.top_k)
            return [{"answers": result} if isinstance(result, list) else result for result in results]

        def problem(line: dict[str, Any]) -> str | None:
            return text_problem(line.get("question"), line.get("context"))

        asking = Asking(problem, ask, ANSWER_FIELDS, "a JSON object with question and context")
        return answer_lines(file, name, asking, show, say)


def tag(args: Sequence[str], show: Say, say: Say) -> int:
    """`qa-dist tag`. `show` gets the entities, `say` what is remarked on them. Exit code 2 if a line of a file of texts
    could not be read; raises `UserError` for one text."""
    options = _parse(TagOptions, "tag", args)
    given = [name for name in ("text", "text_file", "input") if getattr(options, name) is not None]
    if len(given) != 1:
        raise UserError(
            "--text_file: name a file with the text (or -), or --text, or a file of texts (--input); one of them"
        )
    if options.input is not None:
        return _tag_file(options, options.input, show, say)
    text = options.text if options.text_file is None else _read_text(options.text_file, "--text_file")
    from qa_dist.inference.token_classifier import text_problem

    if problem := text_problem(text):
        raise InputError(f"{problem}{f' ({options.text_file})' if options.text_file else ''}")
    classifier = options.tagging.load()
    if len(text or "") > LONG_CONTEXT:
        say(f"reading {len(text or ''):,} characters; this takes a while")
    entities = classifier(text)
    if options.json:
        show(json.dumps(entities, ensure_ascii=False, indent=2))
        return 0
    for found in entities:
        place = f"[{found['start']}:{found['end']}]"
        show(f"{found['score']:.3f}  {found['entity_group']}  {_printable(found['word'])}  {place}")
    if not entities:
        say("there are no entities in it")
    return 0


def _tag_file(options: TagOptions, name: str, show: Say, say: Say) -> int:
    from qa_dist.inference.token_classifier import text_problem

    def text_of(line: dict[str, Any]) -> Any:
        return line["tokens"] if line.get("text") is None else line["text"]

    with _opened(name) as file:
        classifier = options.tagging.load()

        def ask(lines: list[dict[str, Any]]) -> list[dict[str, Any] | UserError]:
            return [{"entities": entities} for entities in classifier([text_of(line) for line in lines])]

        def problem(line: dict[str, Any]) -> str | None:
            given = [name for name in ("text", "tokens") if line.get(name) is not None]
            if len(given) != 1:
                return "there are both text and tokens" if given else "there is neither text nor tokens"
            return text_problem(text_of(line))

        return answer_lines(
            file, name, Asking(problem, ask, TAG_FIELDS, "a JSON object with text or tokens"), show, say
        )


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

    with AnswerServer(
        options.serving.served(),
        options.host,
        options.port,
        max_characters=options.max_characters,
        timeout=options.timeout,
    ) as server:
        if not server.is_local:
            say(f"{options.host} is reached from other machines, and there is no password")
        show(f"{server.url}  (Ctrl-C ends it)")
        server.serve_forever()
    return 0


def _printable(text: str) -> str:
    """In one line, and without commands to the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _parse(options: type[Options], command: str, args: Sequence[str]) -> Options:
    return tyro.cli(options, args=args, prog=f"qa-dist {command}", use_underscores=True)


def _read_text(name: str, option: str = "--context_file") -> str:
    try:
        data = _standard_input().read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"{option}: {name}: {error.strerror or error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{option}: {name}: is not UTF-8 text: line {line} holds the byte 0x{data[error.start]:02x}; convert "
            "it (such as with iconv)"
        ) from None


@contextlib.contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    """A file of lines; - is standard input."""
    with contextlib.ExitStack() as stack:
        try:
            file = _standard_input() if name == "-" else stack.enter_context(Path(name).open("rb"))
        except OSError as error:
            raise UserError(f"--input: {name}: {error.strerror or error}") from None
        yield file


def _standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise UserError("-: standard input is closed")
    return sys.stdin.buffer
