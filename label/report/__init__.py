"""The static report: pages made from finished tables, and from nothing else."""

from .write import write_report

__all__ = ["write_report"]
