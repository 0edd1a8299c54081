"""One machine, without Ray: jobs, blocks, programs, workers, writers and the in-process engine."""
