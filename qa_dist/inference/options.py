"""The options of the commands that use a model."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qa_dist.errors import UserError

if TYPE_CHECKING:  # heavy imports wait until the options are known to be right
    from qa_dist.inference.question_answerer import QuestionAnswerer
    from qa_dist.inference.served import Served
    from qa_dist.inference.token_classifier import TokenClassifier


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
    compile: bool = False
    """Compile the model; worth its while from some thousand texts on."""
    trust_remote_code: bool = False
    """Run code that comes with the model's repository. Only for repositories whose code you have read."""

    def own(self) -> dict[str, Any]:
        """The arguments of `from_pretrained`, but for the name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if name != "model"}


@dataclass
class _ForAnswers:
    decoding: Literal["evaluated", "pipeline"] = "evaluated"
    """How answers are found: evaluated as by qa-dist evaluate and predict; pipeline by the rule of the question
    answering pipeline that transformers 5 removed."""
    max_answer_length: int | None = None
    """Longest answer, in tokens; by default the model's own."""
    no_answer_threshold: float | None = None
    """Of SQuAD 2.0: no answer where its score exceeds the best answer's by more; by default the model's own. Not with
    decoding pipeline."""


@dataclass
class _ForTags:
    labels: tuple[str, ...] = ()
    """Of models that have no names for their labels: all of them, in the order of the model's head."""


@dataclass
class AnsweringOptions(_ForAnswers, ModelOptions):
    """Which model is asked, and how."""

    def load(self) -> "QuestionAnswerer":
        from qa_dist.inference.question_answerer import QuestionAnswerer

        _quieten()
        return QuestionAnswerer.from_pretrained(self.model, **self.own())


@dataclass
class TaggingOptions(_ForTags, ModelOptions):
    """Which model reads, and how."""

    def load(self) -> "TokenClassifier":
        from qa_dist.inference.token_classifier import TokenClassifier

        _quieten()
        return TokenClassifier.from_pretrained(self.model, **self.own())


@dataclass
class ServingOptions(_ForTags, _ForAnswers, ModelOptions):
    """Which model is asked, of either kind, and how."""

    def served(self) -> "Served":
        from qa_dist.inference.loading import task_of
        from qa_dist.inference.question_answerer import QuestionAnswerer
        from qa_dist.inference.served import entities, questions
        from qa_dist.inference.token_classifier import TokenClassifier

        _quieten()
        task = task_of(self.model, self.revision, trust_remote_code=self.trust_remote_code)
        is_tagger = task == TokenClassifier.task_name
        own, other = self.own(), "question answering" if is_tagger else "token classification"
        for field in fields(_ForAnswers if is_tagger else _ForTags):
            if own.pop(field.name) != field.default:
                raise UserError(f"--{field.name}: is for {other}, which {self.model} is not for")
        if is_tagger:
            return entities(TokenClassifier.from_pretrained(self.model, **own), self.model)
        return questions(QuestionAnswerer.from_pretrained(self.model, **own), self.model)


def _quieten() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


Answering = Annotated[AnsweringOptions, tyro.conf.OmitArgPrefixes]
Tagging = Annotated[TaggingOptions, tyro.conf.OmitArgPrefixes]
Serving = Annotated[ServingOptions, tyro.conf.OmitArgPrefixes]


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
class TagOptions:
    """Find the entities in a text, or in many texts of a file."""

    tagging: Tagging
    text: str | None = None
    """The text."""
    text_file: str | None = None
    """Instead: a file that holds the text; - for standard input."""
    input: str | None = None
    """Instead of one text: a file of JSON lines with text, or with tokens (a list of words), - for standard input; each
    line gives a line of JSON with the entities and what else the line held (but for ner_tags). Lines that cannot be
    read give one with the error."""
    json: bool = False
    """Print the entities of one text as JSON."""


@dataclass
class ServeOptions:
    """Serve a page to ask the model on, and POST /answer for programs."""

    serving: Serving
    host: str = "127.0.0.1"
    """Address to listen on. Other machines reach only what is not a loopback address; there is no password."""
    port: int = 8000
    """Port to listen on; 0 for any that is free."""
    max_characters: int = 200_000
    """Longest texts of a request, together."""
    timeout: float = 60.0
    """Seconds that an answer may take."""
