"""One run of each kind from its configuration to its result: train, resume, audit, evaluate, verify."""
