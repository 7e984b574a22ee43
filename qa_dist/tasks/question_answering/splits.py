"""Which examples are trained on and which are held out, wherever they come from."""

import hashlib
import inspect
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from qa_dist.config import DataConfig
from qa_dist.errors import UserError, listing
from qa_dist.tasks.cache import fingerprint
from qa_dist.tasks.question_answering import data, reading, synthetic
from qa_dist.tasks.question_answering.data import Examples
from qa_dist.tasks.question_answering.reading import Record


class Split:
    """The examples of one split, read when first needed: where features are cached, most processes never do."""

    def __init__(self, config: DataConfig, name: str):
        self.config = config
        self.name = name
        """train, validation, or unlabelled: validation examples whose answers, if they have any, are not looked at."""
        self.is_training = name == "train"
        self.is_labelled = name != "unlabelled"

    @property
    def exists(self) -> bool:
        """Whether the config names such data."""
        config = self.config
        if config.synthetic is not None or (config.validation_share and not self.is_training):
            return True
        return bool(self._files) or (config.dataset is not None and self._dataset_split is not None)

    @property
    def _is_cut(self) -> bool:
        """Whether the validation examples are a share of the training data."""
        return self.config.validation_share > 0

    @property
    def _files(self) -> tuple[str, ...]:
        return self.config.train_file if self.is_training or self._is_cut else self.config.validation_file

    @property
    def _files_key(self) -> str:
        return "data.train_file" if self.is_training or self._is_cut else "data.validation_file"

    @property
    def _dataset_split(self) -> str | None:
        return self.config.train_split if self.is_training or self._is_cut else self.config.validation_split

    @property
    def _limit(self) -> int | None:
        return self.config.max_train_samples if self.is_training else self.config.max_validation_samples

    @cached_property
    def fingerprint(self) -> str:
        """Key of everything the examples depend on."""
        config = self.config
        code = [Path(inspect.getfile(module)) for module in (data, reading, synthetic)]
        code.append(Path(__file__))
        settings = [self.name, self._limit, config.on_misaligned, config.unanswerable, config.validation_share]
        settings.append(sorted(config.columns.items()))
        if config.synthetic is not None:
            return fingerprint(config.synthetic, *settings, *code)
        if self._files:
            files = reading.expand(self._files, self._files_key)
            return fingerprint(*files, *settings, *code)
        return fingerprint(self._dataset._fingerprint, *settings, *code)

    @cached_property
    def loaded(self) -> Examples:
        """The examples, checked. Raises `UserError` for what cannot be read or used."""
        config = self.config
        if config.synthetic is not None:
            examples = Examples(synthetic.generate(config.synthetic, "train" if self.is_training else "validation"))
        else:
            records = self._records()
            if self._is_cut:
                held_out = held_out_contexts(records, config.validation_share)
                records = [r for r in records if (r.values.get("context") in held_out) != self.is_training]
            what = {"train": "the training examples", "validation": "the validation examples"}.get(
                self.name, "the data"
            )
            if not self.is_labelled:
                config = config.model_copy(update={"unanswerable": "allow"})
            examples = data.check_records(records, config, what, training=self.is_training)
        if self._limit is not None:
            if self._limit > len(examples.items):
                examples.notes.append(f"{self._limit:,} examples were asked for, there are {len(examples.items):,}")
            examples.items = examples.items[: self._limit]
        return examples

    @property
    def notes(self) -> list[str]:
        return self.loaded.notes

    def _records(self) -> list[Record]:
        columns = self.config.columns
        if self._files:
            files = reading.expand(self._files, self._files_key)
            return [record for file in files for record in reading.read_file(file, columns, self.is_labelled)]
        name = f"{self.config.dataset} ({self._dataset_split})"
        rows = [Record(row, f"{name}, row {i + 1}") for i, row in enumerate(self._dataset.to_list())]
        return reading.with_our_names(rows, columns, name, self.is_labelled)

    @cached_property
    def _dataset(self) -> datasets.Dataset:
        return load_dataset(self.config.dataset or "", self.config.dataset_config, self._dataset_split or "")


def load_dataset(name: str, config_name: str | None, split: str) -> datasets.Dataset:
    """A split of a data set: an id on the Hugging Face Hub, or a directory that `datasets` has written or can read.

    Raises `UserError` when there is none, or the Hub cannot be reached.
    """
    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").is_file():
            loaded: Any = datasets.load_from_disk(str(path))
            if split not in loaded:
                raise UserError(f"data.dataset: {name} has no split {split!r}; it has {listing(list(loaded))}")
            return loaded[split]
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))  # pyright: ignore[reportReturnType] -- one split
        return datasets.load_dataset(name, config_name, split=split)  # pyright: ignore[reportReturnType]
    except UserError:
        raise
    except Exception as error:  # `datasets` passes on whatever its readers and the network raise
        raise UserError(
            f"data.dataset: {name!r} (split {split!r}) cannot be loaded: {_first_line(error)}. It was looked for as a "
            f"directory here, in the cache ({datasets.config.HF_DATASETS_CACHE}) and on the Hub; without a network, "  # pyright: ignore[reportAttributeAccessIssue]
            "point data.train_file and data.validation_file at files"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")


def held_out_contexts(records: list[Record], share: float) -> set[Any]:
    """Contexts whose examples are about `share` of all; the same ones every time. A context is either wholly held
    out or not at all, so that no text is both trained on and scored."""
    contexts = (record.values.get("context") for record in records)
    counts = Counter(context for context in contexts if isinstance(context, str))
    order = sorted(counts, key=lambda context: hashlib.sha256(context.encode("utf-8", "replace")).digest())
    chosen: set[Any] = set()
    held_out = 0
    for context in order:
        if held_out >= share * len(records):
            break
        chosen.add(context)
        held_out += counts[context]
    if len(chosen) == len(order):
        raise UserError(
            f"data.validation_share: {share} of {len(records):,} examples on {len(order):,} contexts leaves none to "
            "train on; lower it, or name a validation_file"
        )
    return chosen
