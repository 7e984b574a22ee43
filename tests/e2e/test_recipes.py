"""The recipes in configs/, each with a small new model of its family in place of the pretrained one."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel

from qa_dist import QuestionAnswerer
from qa_dist.cli import main
from qa_dist.config import SyntheticConfig
from qa_dist.tasks.question_answering import synthetic
from tests.helpers import DISTIL_SIZES, ROOT, SIZES, jsonl
from tests.tokenizers import cased_tokenizer, distilbert_tokenizer, roberta_tokenizer, xlnet_tokenizer

LONG: dict[str, Any] = {"max_position_embeddings": 514}
FAMILIES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "bert_base_squad": ("bert", cased_tokenizer, SIZES | LONG),
    "distilroberta_squad": ("roberta", roberta_tokenizer, SIZES | LONG | {"pad_token_id": 1}),
    "distilbert_squad_v2": ("distilbert", distilbert_tokenizer, DISTIL_SIZES | LONG),
    "xlnet_squad": ("xlnet", xlnet_tokenizer, {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}),
}


def test_every_recipe_is_tried():
    names = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"demo"}
    assert set(FAMILIES) == {name for name in names if "squad" in name}


@pytest.mark.parametrize("recipe", FAMILIES)
def test_a_recipe_trains_a_model_that_answers(recipe: str, tmp_path: Path):
    model_type, make_tokenizer, sizes = FAMILIES[recipe]
    share = 0.4 if recipe.endswith("v2") else 0.0
    examples = synthetic.generate(SyntheticConfig(train_examples=40, unanswerable_share=share, long_share=0.3), "train")
    rows = [
        {
            "id": example.id,
            "question": example.question,
            "context": example.context,
            "answers": {"text": example.answers, "answer_start": example.answer_starts},
        }
        for example in examples
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    tokenizer = make_tokenizer(synthetic.texts(examples))
    AutoModel.from_config(AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **sizes)).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    data = str(tmp_path / "data.json")
    flags = {
        "data.dataset": "none",
        "data.train_file": data,
        "data.validation_file": data,
        "model.name": str(tmp_path / "model"),
        "train.epochs": "1",
        "run.log_every": "1",
        "run.output_dir": str(tmp_path / "run"),
    }
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--config", str(ROOT / f"configs/{recipe}.yaml"), *(f"--{k}={v}" for k, v in flags.items())])
    assert exit_.value.code == 0
    losses = [row["loss"] for row in jsonl(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert losses and all(loss > 0 for loss in losses)
    answerer = QuestionAnswerer.from_pretrained(str(tmp_path / "run"), device="cpu")
    assert (answerer.no_answer_threshold is not None) == recipe.endswith("v2")
    answer = answerer(rows[0]["question"], rows[0]["context"], handle_impossible_answer=False)
    assert answer["answer"] == rows[0]["context"][answer["start"] : answer["end"]] != ""
