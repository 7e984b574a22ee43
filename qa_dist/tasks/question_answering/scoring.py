"""Files of predictions, scored as the official scripts do."""

from pathlib import Path

from qa_dist.config import RunConfig
from qa_dist.errors import UserError, listing
from qa_dist.tasks.predictions import read_mapping, unmatched
from qa_dist.tasks.question_answering.metric import score_predictions
from qa_dist.tasks.question_answering.splits import Split


def score_file(
    config: RunConfig, predictions_file: Path, null_odds_file: Path | None, na_prob_thresh: float
) -> tuple[dict[str, float], list[str]]:
    """The official script's figures for `predictions_file` on the validation examples, and notes for the user.

    SQuAD 2.0's rules hold where data.unanswerable is allow. Raises `UserError` for files that cannot be used.
    """
    v2 = config.data.unanswerable == "allow"
    predictions = read_mapping(predictions_file, "text")
    if null_odds_file is not None and not v2:
        raise UserError("--null_odds: belongs to SQuAD 2.0; add --data.unanswerable allow")
    null_odds = read_mapping(null_odds_file, "number") if null_odds_file else None
    examples = Split(config.data, "validation").loaded
    references = {example.id: example.answers for example in examples.items}
    consequence = "are left out" if v2 else "score 0"
    notes = list(examples.notes)
    notes += unmatched(str(predictions_file), predictions, list(references), "question", consequence)
    if null_odds is not None:
        bare = [key for key in predictions if key in references and key not in null_odds]
        if bare:
            raise UserError(f"{null_odds_file}: {len(bare):,} predictions have no odds there ({listing(bare)})")
    figures = score_predictions(predictions, references, v2=v2, null_odds=null_odds, na_prob_thresh=na_prob_thresh)
    return figures, notes
