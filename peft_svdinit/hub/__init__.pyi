from .base_model import base_on_hub as base_on_hub
from .card_merge import Card as Card
from .push import prepare_repository as prepare_repository
from .push import push_to_hub as push_to_hub
from .shared import Shared as Shared
