"""Pure decisions: values in, values out; no loop, clock, log, metric or chance."""
