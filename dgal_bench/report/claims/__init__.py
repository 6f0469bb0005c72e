"""The paper's claims, judged by rows: ``dgal-bench claims RESULTS``, and the first part of a report's page."""
