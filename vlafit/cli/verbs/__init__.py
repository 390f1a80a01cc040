"""The verbs, one module each: `run(arguments) -> exit status`. Heavy imports live in the functions."""
