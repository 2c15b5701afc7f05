package kubernetes

// k3s describes the distribution of that name as far as hutch knows it without
// a file. It has never run here: its options are those that its documentation
// promises. An image that needs others brings a DistributionFile.
func k3s(binary string) Distribution {
	const data, tls = "/var/lib/rancher/k3s", "/var/lib/rancher/k3s/server/tls"
	return Distribution{
		Version: formatVersion, Name: "k3s", Release: "as installed, untested with hutch",
		Command: []string{
			binary, "server", "--data-dir=" + data, "--node-name=node", "--node-ip=" + nodeIP, "--advertise-address=" + nodeIP,
			"--flannel-iface=" + nodeLink, "--flannel-backend=host-gw", "--write-kubeconfig-mode=0600", "--tls-san=127.0.0.1",
			"--disable=traefik,servicelb,metrics-server,local-storage,coredns", "--disable-network-policy", "--disable-helm-controller",
		},
		Modules: []string{"overlay", "br_netfilter", "bridge", "veth", "nf_conntrack", "nf_nat", "ip_tables", "iptable_nat", "iptable_filter", "xt_comment", "xt_conntrack", "xt_mark", "xt_MASQUERADE", "xt_nat", "xt_multiport", "xt_addrtype", "xt_statistic"},
		Sysctls: map[string]string{"net.ipv4.ip_forward": "1", "net.bridge.bridge-nf-call-iptables": "1"},
		Data:    []string{data, "/var/lib/kubelet", "/var/lib/cni", "/etc/rancher/k3s", "/etc/rancher/node"},
		// k3s writes it with its certificates inside; its cluster, user and
		// context are all called default.
		Kubeconfig: "/etc/rancher/k3s/k3s.yaml", Context: "default",
		API: Access{
			URL: "https://127.0.0.1:6443", Readyz: "/readyz", CA: tls + "/server-ca.crt",
			Cert: tls + "/client-admin.crt", Key: tls + "/client-admin.key",
		},
		Components: []Component{
			{Name: "kube-apiserver", URL: "https://127.0.0.1:6443/livez"},
			{Name: "kube-controller-manager", URL: "https://127.0.0.1:10257/healthz", Insecure: true},
			{Name: "kube-scheduler", URL: "https://127.0.0.1:10259/healthz", Insecure: true},
			{Name: "kubelet", URL: "http://127.0.0.1:10248/healthz"},
			{Name: "kube-proxy", URL: "http://127.0.0.1:10256/healthz"},
		},
		Ready: Ready{Node: "node"},
		Stop:  Stop{Signal: "TERM", Timeout: 20},
		Reset: Reset{Command: []string{"/bin/sh", "-c", k3sReset}, Timeout: 60},
		Leftovers: Leftovers{
			Cgroups: []string{"kubepods"}, ShimNamespaces: []string{"k8s.io"},
			Mounts: []string{"/run/k3s", "/var/lib/kubelet", "/var/lib/rancher/k3s"}, Netns: "/run/netns/cni-",
			Interfaces: []string{"cni0", "flannel.1"}, Chains: []string{"KUBE-", "CNI-", "FLANNEL-"}, Tables: []string{"kube-proxy"},
		},
	}
}

// k3sReset is k3s's own script where it is installed, and takes out the rules
// of the packet filter.
const k3sReset = `k3s-killall.sh >/dev/null 2>&1
for v in iptables ip6tables; do
	command -v $v-save >/dev/null || continue
	$v-save | grep -v -e KUBE- -e CNI- -i -e flannel | $v-restore || exit 1
done`
