from .base_model import named_base as named_base
from .push import prepare_repository as prepare_repository
from .push import push_to_hub as push_to_hub
from .shared import Shared as Shared
