"""From configs/ to checked objects: composition and entry points, the check against signatures, suggestions, sweeps."""

from detector.config.program import as_program, overridden
from detector.config.schema import build, check, config_errors, make_folder
from detector.config.suggest import CONFIGS, arguments, compose, explain
from detector.config.typed import as_typed, literal
from detector.ops.checks import ConfigError, RunError
