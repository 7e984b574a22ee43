"""Question-answering examples, wherever they come from."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

from qa_dist.config import SyntheticConfig
from qa_dist.tasks.question_answering import data, reading, synthetic
from qa_dist.tasks.question_answering.data import Example
from qa_dist.tasks.reading import Record
from qa_dist.tasks.splits import Examples, ExampleSplit


class Split(ExampleSplit[Example]):
    """Questions, contexts and answers; without labels, whatever is said of the answers is not looked at."""

    modules = (data, reading, synthetic)

    @property
    def settings(self) -> list[Any]:
        return [self.config.on_misaligned, self.config.unanswerable]

    def generate(self, config: SyntheticConfig, split: str) -> list[Example]:
        return synthetic.generate(config, split)

    def read(self, path: Path) -> list[Record]:
        return reading.read_file(path, self.config.columns, self.is_labelled)

    def named(self, records: list[Record], name: str) -> list[Record]:
        return reading.with_our_names(records, self.config.columns, name, self.is_labelled)

    def text_of(self, record: Record) -> Hashable:
        context = record.values.get("context")
        return context if isinstance(context, str) else None

    def check(self, records: list[Record], name: str) -> Examples[Example]:
        config = self.config if self.is_labelled else self.config.model_copy(update={"unanswerable": "allow"})
        return data.check_records(records, config, name, training=self.is_training)
