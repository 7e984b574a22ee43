"""A model for question answering whose parts are made in another order than those of transformers' own."""

from typing import Any

import torch
from torch import nn
from transformers import BertModel, BertPreTrainedModel


class HeadFirst(BertPreTrainedModel):
    """`BertForQuestionAnswering` by another constructor."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        torch.rand(3)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.post_init()
