"""One page of all that was measured, beside what the papers published: `python -m report`."""
