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


def score(config: RunConfig, options: Mapping[str, str | None]) -> tuple[dict[str, float], list[str]]:
    """The figures, and notes for the user. Raises `UserError` for options and files that cannot be used."""
    if options["predictions"] is None:
        raise UserError("--predictions: is not set; name a JSON file of predictions")
    predictions = Path(options["predictions"])
    if config.task == "token_classification":
        from qa_dist.tasks.token_classification.scoring import score_file as score_entities

        for name in ("null_odds", "na_prob_thresh"):
            if options[name] is not None:
                raise UserError(f"--{name}: is for question answering")
        return score_entities(config, predictions)
    from qa_dist.tasks.question_answering.scoring import score_file as score_answers

    try:
        na_prob_thresh = float(options["na_prob_thresh"] or 1.0)
    except ValueError:
        raise UserError(f"--na_prob_thresh: {options['na_prob_thresh']!r} is not a number") from None
    odds_file = Path(options["null_odds"]) if options["null_odds"] else None
    return score_answers(config, predictions, odds_file, na_prob_thresh)
