"""The configuration of each part of the cluster, as command lines and documents. This module does no I/O.

Documents are JSON, which every YAML reader accepts; only containerd needs TOML.
"""

from pathlib import Path
from typing import Any

from deploy.cluster import layout

_KUBE = str(layout.BIN / "kube")
_ADMIN = str(layout.KUBECONFIG)


def etcd() -> list[str]:
    """Returns etcd's command line. etcd does not sync to disk, because none of its data outlives the cluster."""
    client, peer = (f"http://127.0.0.1:{layout.ETCD_PORT + step}" for step in (0, 1))
    return [
        str(layout.BIN / "etcd"),
        f"--data-dir={layout.ETCD}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def apiserver() -> list[str]:
    """Returns the API server's command line. It listens only on the node's address."""
    pki = layout.PKI
    return [
        _KUBE,
        "apiserver",
        f"--etcd-servers=http://127.0.0.1:{layout.ETCD_PORT}",
        f"--bind-address={layout.NODE_IP}",
        f"--advertise-address={layout.NODE_IP}",
        f"--secure-port={layout.API_PORT}",
        f"--service-cluster-ip-range={layout.SERVICE_RANGE}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--service-account-issuer=https://kubernetes.default.svc.{layout.DOMAIN}",
        f"--service-account-key-file={pki / 'accounts.key'}",
        f"--service-account-signing-key-file={pki / 'accounts.key'}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        # Names of nodes do not resolve, so logs and exec reach the kubelet by address.
        "--kubelet-preferred-address-types=InternalIP",
        f"--kubelet-client-certificate={pki / 'admin.crt'}",
        f"--kubelet-client-key={pki / 'admin.key'}",
        f"--kubelet-certificate-authority={pki / 'ca.crt'}",
    ]


def manager() -> list[str]:
    """Returns the controllers' command line. `--secure-port=0` leaves their ports to other programs, because nothing
    connects to the controllers."""
    pki = layout.PKI
    return [
        _KUBE,
        "controller-manager",
        *_as_admin(),
        f"--service-account-private-key-file={pki / 'accounts.key'}",
        f"--root-ca-file={pki / 'ca.crt'}",
        f"--cluster-signing-cert-file={pki / 'ca.crt'}",
        f"--cluster-signing-key-file={pki / 'ca.key'}",
        "--use-service-account-credentials",
        "--allocate-node-cidrs=false",
    ]


def scheduler() -> list[str]:
    """Returns the scheduler's command line."""
    return [_KUBE, "scheduler", *_as_admin()]


def _as_admin() -> list[str]:
    return [
        f"--kubeconfig={_ADMIN}",
        f"--authentication-kubeconfig={_ADMIN}",
        f"--authorization-kubeconfig={_ADMIN}",
        "--leader-elect=false",
        "--secure-port=0",
    ]


def containerd() -> list[str]:
    """Returns the command line of the cluster's own containerd, which does not affect one that the machine may run."""
    return ["containerd", "--config", str(layout.CONTAINERD / "config.toml")]


def containerd_file(plugins: Path) -> str:
    """Returns containerd's configuration; `plugins` is the folder of the network plugins.

    `restrict_oom_score_adj` is set because many containers lack CAP_SYS_RESOURCE, and runc fails if it may not lower a
    score.
    """
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""version = 2
root = "{layout.CONTAINERS}"
state = "{layout.CONTAINERD}/state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{layout.CONTAINERD_SOCKET}"
[{cri}]
  sandbox_image = "{layout.PAUSE_IMAGE}"
  restrict_oom_score_adj = true
[{cri}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[{cri}.cni]
  bin_dir = "{plugins}"
  conf_dir = "{layout.NET}"
"""


def pod_network() -> dict[str, Any]:
    """Returns the configuration of the pods' network: one bridge. Nothing is masqueraded, since nothing leaves the
    machine."""
    bridge = {
        "type": "bridge",
        "bridge": layout.POD_BRIDGE,
        "isGateway": True,
        "hairpinMode": True,  # a pod may reach itself through its service
        "ipam": {
            "type": "host-local",
            "dataDir": str(layout.IPAM),
            "ranges": [[{"subnet": layout.POD_RANGE}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return {
        "cniVersion": "1.0.0",
        "name": "mesh-pods",
        "plugins": [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}],
    }


def kubelet() -> list[str]:
    """Returns the kubelet's command line."""
    return [
        _KUBE,
        "kubelet",
        f"--config={layout.RUN / 'kubelet.json'}",
        f"--kubeconfig={layout.RUN / 'kubelet.kubeconfig'}",
        f"--hostname-override={layout.NODE}",
        f"--node-ip={layout.NODE_IP}",
        f"--root-dir={layout.KUBELET}",
    ]


def kubelet_file() -> dict[str, Any]:
    """Returns the kubelet's configuration, with the cluster's own folders instead of the machine's."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": layout.NODE_IP,
        "healthzPort": 0,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(layout.PKI / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(layout.PKI / "kubelet.crt"),
        "tlsPrivateKeyFile": str(layout.PKI / "kubelet.key"),
        "clusterDNS": [layout.DNS_IP],
        "clusterDomain": layout.DOMAIN,
        "resolvConf": "",  # pods resolve the cluster's names, and no others
        "containerRuntimeEndpoint": f"unix://{layout.CONTAINERD_SOCKET}",
        "podLogsDir": str(layout.RUN / "pods"),
        "volumePluginDir": str(layout.KUBELET / "volume-plugins"),
        # Works with both versions of cgroups, and without systemd.
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,  # lower ones require CAP_SYS_RESOURCE
        "crashLoopBackOff": {"maxContainerRestartPeriod": "10s"},  # five minutes, by default
        "syncFrequency": "10s",  # the delay of changed Secrets and ConfigMaps in pods; a minute, by default
        # This cluster neither reacts to a full disk nor removes the images of tests.
        "evictionHard": {"memory.available": "100Mi"},
        "imageGCHighThresholdPercent": 100,
    }


def proxy() -> list[str]:
    """Returns kube-proxy's command line."""
    return [_KUBE, "proxy", f"--config={layout.RUN / 'proxy.json'}"]


def proxy_file() -> dict[str, Any]:
    """Returns kube-proxy's configuration.

    `masqueradeAll` is set because pods share one bridge. If bridged packets bypass iptables, a pod would otherwise
    answer the caller directly, from an address that the caller never called.
    """
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clientConnection": {"kubeconfig": _ADMIN},
        "hostnameOverride": layout.NODE,
        "clusterCIDR": layout.POD_RANGE,
        "bindAddress": layout.NODE_IP,
        "healthzBindAddress": f"{layout.NODE_IP}:10256",
        "metricsBindAddress": f"{layout.NODE_IP}:10249",
        "iptables": {"masqueradeAll": True, "localhostNodePorts": False, "minSyncPeriod": "0s"},
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }


def dns_objects() -> list[dict[str, Any]]:
    """Returns the objects that run CoreDNS at the address that the kubelet gives every pod."""
    names = {"name": "coredns", "namespace": "kube-system"}
    corefile = f".:53 {{\n errors\n ready\n kubernetes {layout.DOMAIN} in-addr.arpa {{\n  ttl 5\n }}\n}}\n"
    container = {
        "name": "coredns",
        "image": layout.DNS_IMAGE,
        "imagePullPolicy": "Never",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}],
    }
    pod = {
        "serviceAccountName": "coredns",
        "dnsPolicy": "Default",
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
    }
    rules = [
        {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    rbac = "rbac.authorization.k8s.io"
    ports = [{"name": name, "port": 53, "protocol": name.upper()} for name in ("udp", "tcp")]
    labels = {"k8s-app": "kube-dns"}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": names},
        {"apiVersion": f"{rbac}/v1", "kind": "ClusterRole", "metadata": {"name": "coredns"}, "rules": rules},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "coredns"},
            "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": "coredns"},
            "subjects": [{"kind": "ServiceAccount", **names}],
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": names, "data": {"Corefile": corefile}},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": names,
            "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system"},
            "spec": {"clusterIP": layout.DNS_IP, "selector": labels, "ports": ports},
        },
    ]
