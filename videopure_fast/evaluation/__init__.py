"""Accuracy of defenses under attack, threat model by threat model: `benchmark` does an evaluation in one call."""

from .benchmark import benchmark
from .plan import EvalBatch, Plan, Threat, ThreatModel, standard_threat
from .record import Record
from .report import Report
from .runner import EvalContext, evaluate
from .tables import Accuracy, table, wilson_interval

__all__ = [
    "Accuracy",
    "EvalBatch",
    "EvalContext",
    "Plan",
    "Record",
    "Report",
    "Threat",
    "ThreatModel",
    "benchmark",
    "evaluate",
    "standard_threat",
    "table",
    "wilson_interval",
]
