"""What a person reads: tables of parameters, and what a run has come to."""

from lightning_peft.reports.parameters import parameter_table
from lightning_peft.reports.tuning_report import TuningReport

__all__ = ["TuningReport", "parameter_table"]
