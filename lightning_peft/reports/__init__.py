"""What a person reads: tables of parameters, and what a run has come to."""

from lightning_peft.reports.bias_report import BiasReport, bias_changes, bias_table, plot_biases
from lightning_peft.reports.confusion import confusion_table
from lightning_peft.reports.nearest_words import NearestWords
from lightning_peft.reports.parameters import parameter_table
from lightning_peft.reports.predictions import PredictionWriter
from lightning_peft.reports.rows import ResultRows, read_rows, write_rows
from lightning_peft.reports.tuning_report import TuningReport
from lightning_peft.tasks.base_to_new import base_new_table, harmonic_mean

__all__ = [
    "BiasReport",
    "NearestWords",
    "PredictionWriter",
    "ResultRows",
    "TuningReport",
    "base_new_table",
    "bias_changes",
    "bias_table",
    "confusion_table",
    "harmonic_mean",
    "parameter_table",
    "plot_biases",
    "read_rows",
    "write_rows",
]
