"""Concepts: an expert's definitions over panel columns, admitted, computed and checked."""
