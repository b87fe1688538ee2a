"""What FLUX's blocks compute between products, as one kernel each where there is Triton."""
