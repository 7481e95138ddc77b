"""What a person reads: tables of parameters, and what a run has come to."""

from lightning_peft.reports.confusion import confusion_table
from lightning_peft.reports.parameters import parameter_table
from lightning_peft.reports.predictions import PredictionWriter
from lightning_peft.reports.tuning_report import TuningReport

__all__ = ["PredictionWriter", "TuningReport", "confusion_table", "parameter_table"]
