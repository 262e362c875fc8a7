# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Calibration and evaluation data: conversations with images and sounds.

conversations = read_conversations("samples.jsonl")
samples = ProcessedConversations(conversations, processor, model.config)
recipe = calibrate(model, samples)
"""

from torchao_masquant.data.parts import Conversation, Message, Part
from torchao_masquant.data.placing import PlacedSamples
from torchao_masquant.data.processing import ProcessedConversations, media_of
from torchao_masquant.data.reading import read_conversations
from torchao_masquant.data.saved_samples import SavedSamples

__all__ = [
    "Conversation",
    "Message",
    "Part",
    "PlacedSamples",
    "ProcessedConversations",
    "SavedSamples",
    "media_of",
    "read_conversations",
]
