"""Files of predictions, whoever made them, scored as the official scripts do."""

from collections.abc import Mapping
from pathlib import Path

from qa_dist.config import RunConfig
from qa_dist.errors import UserError

OPTIONS = {
    "predictions": "JSON file of predictions: id -> text; for token classification id -> list of entities, as in "
    "predictions.json, or the data again with the predicted tags.",
    "null_odds": "With data.unanswerable allow: JSON file, id -> score of no answer, for the best thresholds.",
    "na_prob_thresh": "Predictions with higher null odds count as no answer; 1.0 by default.",
}


Figures = tuple[dict[str, float], list[str]]


def score(config: RunConfig, options: Mapping[str, str | None]) -> Figures:
    """The figures, and notes for the user. Raises `UserError` for options and files that cannot be used."""
    if options["predictions"] is None:
        raise UserError("--predictions: is not set; name a JSON file of predictions")
    if config.task not in SCORERS:
        raise UserError(f"task: qa-dist score knows no files of {config.task}; qa-dist evaluate scores a model")
    return SCORERS[config.task](config, Path(options["predictions"]), options)


def _score_answers(config: RunConfig, predictions: Path, options: Mapping[str, str | None]) -> Figures:
    from qa_dist.tasks.question_answering.scoring import score_file

    try:
        na_prob_thresh = float(options["na_prob_thresh"] or 1.0)
    except ValueError:
        raise UserError(f"--na_prob_thresh: {options['na_prob_thresh']!r} is not a number") from None
    odds_file = Path(options["null_odds"]) if options["null_odds"] else None
    return score_file(config, predictions, odds_file, na_prob_thresh)


def _score_entities(config: RunConfig, predictions: Path, options: Mapping[str, str | None]) -> Figures:
    from qa_dist.tasks.token_classification.scoring import score_file

    for name in ("null_odds", "na_prob_thresh"):
        if options[name] is not None:
            raise UserError(f"--{name}: is for question answering")
    return score_file(config, predictions)


SCORERS = {"question_answering": _score_answers, "token_classification": _score_entities}
