from .factors import FactorsFile as FactorsFile
from .factors import FactorsMetadata as FactorsMetadata
from .factors import LineSearch as LineSearch
from .factors import LowRankFactors as LowRankFactors
from .factors import SvdGuided as SvdGuided
from .factors import activation_factors as activation_factors
from .factors import base_samples as base_samples
from .factors import descent_directions as descent_directions
from .factors import gradient_factors as gradient_factors
from .factors import line_search as line_search
from .factors import lora_ga_factors as lora_ga_factors
from .factors import recommend_ranks as recommend_ranks
from .factors import relative_spectra as relative_spectra
from .factors import save_factors as save_factors
from .factors import scaled as scaled
from .factors import warm_start as warm_start
from .factors import weight_factors as weight_factors
from .factors import weight_norms as weight_norms
from .hub import push_to_hub as push_to_hub
from .tuner import LoriConfig as LoriConfig
from .tuner import SvdLoraConfig as SvdLoraConfig
from .tuner import initialize_lora_from_factors as initialize_lora_from_factors
from .tuner import register as register
from .tuner import unregister as unregister

__version__: str
