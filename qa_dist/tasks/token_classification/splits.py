"""Sentences with labelled words, wherever they come from."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

from qa_dist.config import SyntheticConfig
from qa_dist.tasks.reading import Record, names_of
from qa_dist.tasks.splits import Examples, ExampleSplit
from qa_dist.tasks.token_classification import data, reading, scheme, synthetic
from qa_dist.tasks.token_classification.data import Example


class Split(ExampleSplit[Example]):
    """Words and their labels; tags that are numbers get the names of the data set, or those of data.labels."""

    modules = (data, reading, scheme, synthetic)

    @property
    def settings(self) -> list[Any]:
        return [self.config.labels]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the labels, in the order of their numbers, where a data set says it, or data.labels does."""
        config = self.config
        if config.dataset is None or config.synthetic is not None:
            return config.labels
        return names_of(self.dataset.features.get(config.columns.get("ner_tags", "ner_tags"))) or config.labels

    def generate(self, config: SyntheticConfig, split: str) -> list[Example]:
        return synthetic.generate(config, split)

    def read(self, path: Path) -> list[Record]:
        return reading.read_file(path, self.config.columns, self.is_labelled)

    def named(self, records: list[Record], name: str) -> list[Record]:
        return reading.with_our_names(records, self.config.columns, name, self.is_labelled)

    def text_of(self, record: Record) -> Hashable:
        words = record.values.get("tokens")
        return tuple(map(str, words)) if isinstance(words, list) else None

    def check(self, records: list[Record], name: str) -> Examples[Example]:
        return data.check_records(records, name, labelled=self.is_labelled, names=self.names)
