"""Stage 2 of a plan: our request scheduler, kv blocks and expert cache on a calibrated clock.

routing            which experts the simulated tokens choose      (a trace, or a popularity)
foresight          what a predictor says of them
busy               what each resource did in each phase
experts            how long a layer's experts take: all in memory
link, over_disk    over the disk
on_device_experts  on a device, over host memory or over both; on_device: all else that it computes
clock              how long a step takes: `EngineStepCosts` and the experts
closed             which requests run in which step where clients wait for their answers
system, traffic    requests from their arrival to their end, and what comes of it
"""
