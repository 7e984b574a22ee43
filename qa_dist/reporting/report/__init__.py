"""The report: one HTML file on a run, for a browser that is offline."""

from qa_dist.reporting.report.page import write_report

__all__ = ["write_report"]
