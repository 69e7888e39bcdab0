"""The whole path from a frozen model to a judged controller, step by step, resumable and without printing."""

from pacevlm.pipeline.context import Reporter, RunContext
from pacevlm.pipeline.loading import load_elastic_model
from pacevlm.pipeline.run import STEPS, run_pipeline
from pacevlm.pipeline.run_config import RunConfig, quickstart_config

__all__ = ["STEPS", "Reporter", "RunConfig", "RunContext", "load_elastic_model", "quickstart_config", "run_pipeline"]
