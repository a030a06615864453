"""04, 05, 06: tables, verdicts, sentences and figures, from result files alone."""
