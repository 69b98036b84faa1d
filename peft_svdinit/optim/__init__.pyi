from .adam_moments import MOMENTS_FILE_NAME as MOMENTS_FILE_NAME
from .adam_moments import install_moments as install_moments
from .adam_moments import keeps_moments as keeps_moments
from .adam_moments import load_moments as load_moments
from .adam_moments import lora_parameters as lora_parameters
from .adam_moments import save_moments as save_moments
