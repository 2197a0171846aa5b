"""What `python -m focalnet_kernels bench` times, and how.

layers.py, cases.py: what; providers.py: the implementations under comparison; runner.py: checked, timed and weighed;
roofline.py: against which bound;
records.py: kept with the machine it was found on.
"""
