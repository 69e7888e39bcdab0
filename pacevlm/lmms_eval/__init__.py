"""What lmms-eval finds as an entry point; every start of lmms-eval loads this, so the model stands in its own file."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("pacevlm", chat_class_path="pacevlm.lmms_eval.model.PacedModel")
