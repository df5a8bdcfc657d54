"""One HTML file about one training run: what was trained, what it changed, and what that looks like."""

from sam3_lora.report.history import History, ReportError, Step, read_history
from sam3_lora.report.page import write_report
from sam3_lora.report.pictures import GROUPS, Picture, choose_pictures
from sam3_lora.report.run import REPORT_FILE, Measured, report_of_run

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
    "report_of_run",
    "write_report",
]
