"""The fields of Kubernetes and Kubeflow that our manifest uses, with the rules of their API.

PyTorchJob: custom resource definition and admission webhook of kubeflow/training-operator 1.8
(manifests/base/crds/kubeflow.org_pytorchjobs.yaml, pkg/webhooks/pytorch). The rest: Kubernetes' API reference v1. A
field that is not listed here is refused, as the API server refuses one that does not exist.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

Dns1035 = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Dns1123 = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Port = Annotated[int, Field(ge=1, le=65535)]
Positive = Annotated[int, Field(ge=1)]


def quantity(value: str | int) -> float:
    """An amount such as 64Gi or 500m."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)(m|[kMGTPE]|[KMGTPE]i)?", str(value))
    assert matched, f"{value} is not a quantity"
    suffix = matched[2] or ""
    powers = {"m": 1e-3, "": 1.0, **{letter: 1000.0**n for n, letter in enumerate("kMGTPE", start=1)}}
    powers |= {f"{letter}i": 1024.0**n for n, letter in enumerate("KMGTPE", start=1)}
    return float(matched[1]) * powers[suffix]


class Strict(BaseModel):
    """An object of the API: names in camelCase, no others, and types as they are."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Strict):
    name: Dns1035


class EmptyDir(Strict):
    medium: Literal["", "Memory"] = ""
    size_limit: str | int | None = None


class Claim(Strict):
    claim_name: Dns1123


class Volume(Strict):
    name: Dns1123
    empty_dir: EmptyDir | None = None
    persistent_volume_claim: Claim | None = None

    @model_validator(mode="after")
    def has_one_source(self) -> Volume:
        assert (self.empty_dir is None) != (self.persistent_volume_claim is None)
        return self


class Mount(Strict):
    name: Dns1123
    mount_path: Annotated[str, Field(pattern=r"^[^:]+$")]


class ContainerPort(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=15)]
    container_port: Port


class Resources(Strict):
    requests: dict[str, str | int]
    limits: dict[str, str | int]

    @model_validator(mode="after")
    def requests_are_within_limits(self) -> Resources:
        for name, requested in self.requests.items():
            assert quantity(requested) <= quantity(self.limits.get(name, "1000P")), name
        return self


class Container(Strict):
    name: Dns1123
    image: str
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"]
    working_dir: str
    command: list[str]
    args: list[str]
    ports: list[ContainerPort]
    resources: Resources
    volume_mounts: list[Mount]


class PodSpec(Strict):
    termination_grace_period_seconds: Annotated[int, Field(ge=0)]
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]

    @model_validator(mode="after")
    def mounts_are_volumes(self) -> PodSpec:
        names = [volume.name for volume in self.volumes]
        assert len(set(names)) == len(names)
        for container in self.containers:
            assert {mount.name for mount in container.volume_mounts} <= set(names)
            assert len({mount.mount_path for mount in container.volume_mounts}) == len(container.volume_mounts)
        return self


class PodTemplate(Strict):
    spec: PodSpec


class Replicas(Strict):
    replicas: Positive
    restart_policy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: PodTemplate

    @model_validator(mode="after")
    def has_the_operators_container(self) -> Replicas:
        (container,) = (one for one in self.template.spec.containers if one.name == "pytorch")
        assert [port.name for port in container.ports] == ["pytorchjob-port"]
        return self


class ElasticPolicy(Strict):
    rdzv_backend: Literal["c10d", "etcd", "etcd-v2"]
    min_replicas: Positive
    max_replicas: Positive
    max_restarts: Annotated[int, Field(ge=0)]


class RunPolicy(Strict):
    clean_pod_policy: Literal["All", "Running", "None"]
    backoff_limit: Annotated[int, Field(ge=0)]


class ReplicaSpecs(BaseModel):
    """Its names have capitals."""

    model_config = ConfigDict(extra="forbid", strict=True)
    Worker: Replicas


class JobSpec(Strict):
    nproc_per_node: str
    elastic_policy: ElasticPolicy
    run_policy: RunPolicy
    pytorch_replica_specs: ReplicaSpecs

    @model_validator(mode="after")
    def numbers_agree(self) -> JobSpec:
        assert self.nproc_per_node in ("auto", "cpu", "gpu") or int(self.nproc_per_node) >= 1
        assert self.elastic_policy.min_replicas <= self.elastic_policy.max_replicas
        return self


class PyTorchJob(Strict):
    api_version: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: Metadata
    spec: JobSpec


class ClaimRequests(Strict):
    requests: dict[Literal["storage"], str]


class ClaimSpec(Strict):
    access_modes: list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]]
    storage_class_name: str
    resources: ClaimRequests


class PersistentVolumeClaim(Strict):
    api_version: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec
