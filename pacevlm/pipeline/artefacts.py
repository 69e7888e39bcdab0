"""What a run directory holds, by name, and how to clear it."""

from __future__ import annotations

import shutil

from pacevlm.errors import ConfigError
from pacevlm.pipeline.outputs import OUTPUT_NAMES
from pacevlm.pipeline.run_config import RunConfig
from pacevlm.pipeline.step_log import STEP_LOG_NAME

CONFIG_NAME, OUTCOMES_NAME = "config.json", "outcomes.jsonl"
PROFILE_NAME, ESTIMATOR_NAME, OUTPUT_LENGTH_NAME = "profile.json", "estimator.json", "output_length.json"
# The guardrail as profiled, which training uses, and as calibrated again on what the controller picks.
PROFILE_GUARDRAIL_NAME, GUARDRAIL_NAME = "guardrail_profile.json", "guardrail.json"
CONTROLLER_NAME, BUNDLE_NAME = "controller", "bundle"
LOOKUP_NAME, STATIC_NAME = "lookup_table.json", "static.json"


def remove_artefacts(config: RunConfig) -> None:
    """Delete what the steps of a run wrote into its directory, and nothing else there.

    Raises:
        ConfigError: the directory holds files, but none says that it is a run's.
    """
    run_dir = config.run_dir
    if not run_dir.exists():
        return
    if not (run_dir / CONFIG_NAME).exists():
        if any(run_dir.iterdir()):
            raise ConfigError(
                f"{run_dir} holds files but no {CONFIG_NAME}, so it is no run's directory; nothing was removed: give "
                "another run directory"
            )
        return
    for name in (CONTROLLER_NAME, BUNDLE_NAME, config.train.run_dir):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    files = (
        *(STEP_LOG_NAME, CONFIG_NAME, OUTCOMES_NAME, PROFILE_NAME, f"{PROFILE_NAME}.partial.jsonl", ESTIMATOR_NAME),
        *(OUTPUT_LENGTH_NAME, PROFILE_GUARDRAIL_NAME, GUARDRAIL_NAME, LOOKUP_NAME, STATIC_NAME, *OUTPUT_NAMES),
    )
    for name in files:
        (run_dir / name).unlink(missing_ok=True)
