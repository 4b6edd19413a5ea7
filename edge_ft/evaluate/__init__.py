"""Scores of anything that gives log-probabilities or answers, and whether they are good enough to ship."""
