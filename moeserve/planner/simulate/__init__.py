"""Stage 2 of a plan: our request scheduler, kv blocks and expert cache on a calibrated clock.

routing   which experts the simulated tokens choose      (a trace, or a popularity)
busy      what each resource did in each phase
experts   how long a layer's experts take: resident, over the disk, on a device
clock     how long a step takes: `StepCosts` and the experts
system    requests from their arrival to their end, and what comes of it
"""
