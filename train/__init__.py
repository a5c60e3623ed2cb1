"""Decides when and with what: the loop, schedules, weights in and out, evaluation, metrics."""
