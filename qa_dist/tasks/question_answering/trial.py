"""Whether a new model can learn to answer questions: its logits for a context have to depend on the question."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qa_dist.errors import UserError
from qa_dist.tasks.question_answering.layout import PairTemplate
from qa_dist.tasks.trial import TRIAL_TOKENS, padding_notes, trial_logits, trial_tokens

QUESTION_TOKENS = 4


def try_out(model: nn.Module, tokenizer: PreTrainedTokenizerBase, template: PairTemplate, max_length: int) -> list[str]:
    """Give `model` one context with two questions of the same length, and a window with padding.

    Returns notes for the user. Raises `UserError` where the logits for the context are the same with both questions.
    """
    size = min(TRIAL_TOKENS, 2 * max_length // 3) - template.num_special - QUESTION_TOKENS
    if size < 1:
        return []
    context = trial_tokens(tokenizer, size)
    questions = [trial_tokens(tokenizer, QUESTION_TOKENS, shift) for shift in (1, 2)]
    windows = [template.window(question, context) for question in questions]
    one, other = (trial_logits(model, tokenizer, tokens)[place] for tokens, place in windows)
    if torch.equal(one, other):
        remedy = "Use another model"
        if not template.question_first:
            remedy = (
                "Its windows begin with the context, as its tokenizer pads on the left. If the model reads from left "
                'to right, set padding_side to "right" in tokenizer_config.json; else use another model'
            )
        raise UserError(
            "the model's logits for a context do not change with the question, so it cannot learn to answer questions. "
            f"{remedy}"
        )
    return padding_notes(model, tokenizer, windows[0][0], max_length)
