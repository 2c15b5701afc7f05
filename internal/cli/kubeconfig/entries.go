package kubeconfig

import (
	"errors"
	"fmt"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// Entries are a cluster, a user and a context of one name.
type Entries struct {
	Name    string
	cluster *api.Cluster
	user    *api.AuthInfo
	context *api.Context
}

// New takes the entries of context out of a kubeconfig and gives them name, and
// the cluster another server. ServerName is the name that the server's
// certificate must have, empty: that in the URL.
func New(yaml []byte, context, name, server, serverName string) (Entries, error) {
	from, err := clientcmd.Load(yaml)
	if err != nil {
		return Entries{}, fmt.Errorf("read the kubeconfig of the sandbox: %w", err)
	}
	if context == "" {
		context = from.CurrentContext
	}
	c := from.Contexts[context]
	if c == nil {
		return Entries{}, fmt.Errorf("the kubeconfig of the sandbox has no context %q", context)
	}
	e := Entries{Name: name, cluster: from.Clusters[c.Cluster], user: from.AuthInfos[c.AuthInfo], context: c}
	if e.cluster == nil || e.user == nil {
		return Entries{}, fmt.Errorf("the kubeconfig of the sandbox has no cluster or no user for its context %q", context)
	}
	if err := e.check(); err != nil {
		return Entries{}, fmt.Errorf("the kubeconfig of the sandbox: %w", err)
	}
	e.cluster.Server, e.cluster.TLSServerName = server, serverName
	e.context.Cluster, e.context.AuthInfo = name, name
	return e, nil
}

// check refuses what would have kubectl read files or run programs of this
// machine because a sandbox says so.
func (e Entries) check() error {
	if e.cluster.CertificateAuthority != "" || e.user.ClientCertificate != "" || e.user.ClientKey != "" || e.user.TokenFile != "" {
		return errors.New("it names files, which are in the guest only")
	}
	if e.user.Exec != nil || e.user.AuthProvider != nil {
		return errors.New("it wants to run programs for its credentials")
	}
	if e.cluster.ProxyURL != "" || e.cluster.InsecureSkipTLSVerify {
		return errors.New("it wants a proxy, or no certificate to be checked")
	}
	return nil
}

// YAML returns a kubeconfig with these entries alone, in which they are current.
func (e Entries) YAML() ([]byte, error) {
	c := api.NewConfig()
	e.put(c)
	c.CurrentContext = e.Name
	return clientcmd.Write(*c)
}

// put adds the entries to c, in the place of those that have their name.
func (e Entries) put(c *api.Config) {
	c.Clusters[e.Name], c.AuthInfos[e.Name], c.Contexts[e.Name] = e.cluster.DeepCopy(), e.user.DeepCopy(), e.context.DeepCopy()
}
