"""What `python -m focalnet_kernels bench` times, and how.

cases.py: what; providers.py: by whom; runner.py: checked, timed and weighed; roofline.py: against which bound;
records.py: kept with the machine it was found on.
"""
