"""One HTML file about a training run or an evaluation: what was done, what it changed, and what that looks like."""

from sam3_lora.report.evaluation import report_of_evaluation
from sam3_lora.report.page import REPORT_FILE, write_report
from sam3_lora.report.pictures import GROUPS, Picture, choose_pictures
from sam3_lora.report.run import Measured, report_of_run
from sam3_lora.training.history import History, ReportError, Step, read_history

__all__ = [
    "GROUPS",
    "REPORT_FILE",
    "History",
    "Measured",
    "Picture",
    "ReportError",
    "Step",
    "choose_pictures",
    "read_history",
    "report_of_evaluation",
    "report_of_run",
    "write_report",
]
