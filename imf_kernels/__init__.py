from imf_kernels.dual import Dual, linear_map
from imf_kernels.ops.rms_norm import rms_norm
