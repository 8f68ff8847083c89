"""A run as one page: curves, tables, pictures, failures, the Prompter's attention (`cllip-fast report`)."""

from cllip_fast.report.page import write_report

__all__ = ["write_report"]
