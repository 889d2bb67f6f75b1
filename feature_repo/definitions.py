"""What `feast apply` finds: the entity, the views and the services that the contract states."""

from streamflow.features import entity, feature_services, feature_views

user = entity()
globals().update({view.name: view for view in feature_views()})
globals().update({service.name: service for service in feature_services()})
