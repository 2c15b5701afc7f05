package control

import (
	"context"
	"fmt"
	"path/filepath"

	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/client-go/rest"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"

	"github.com/hutch-run/hutch/kube/internal/pki"
)

// authentication lets nobody in without a certificate or a token, but for the question whether the server is well.
const authentication = `apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
anonymous:
  enabled: true
  conditions:
  - path: /livez
  - path: /readyz
  - path: /healthz
`

// RunAPIServer serves the API until ctx ends.
func RunAPIServer(ctx context.Context, p Params) error {
	auth := filepath.Join(p.Data, "authentication.yaml")
	if err := pki.WriteFile(auth, []byte(authentication), 0o600); err != nil {
		return err
	}
	s := options.NewServerRunOptions()
	if err := parse(s.Flags(), p.apiserver(auth)); err != nil {
		return err
	}
	if err := s.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return err
	}
	rest.SetDefaultWarningHandler(rest.NoWarnings{}) // warnings are for people
	c, err := s.Complete(ctx)
	if err != nil {
		return err
	}
	if errs := c.Validate(); len(errs) > 0 {
		return utilerrors.NewAggregate(errs)
	}
	return app.Run(ctx, c)
}

func (p Params) apiserver(auth string) []string {
	return []string{
		"--etcd-servers=" + p.Etcd,
		"--bind-address=0.0.0.0", fmt.Sprintf("--secure-port=%d", p.Port), "--advertise-address=" + p.NodeIP,
		"--tls-cert-file=" + p.PKI.Cert(LeafAPI), "--tls-private-key-file=" + p.PKI.Key(LeafAPI),
		"--client-ca-file=" + p.PKI.Cert("ca"), "--authentication-config=" + auth,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--service-account-issuer=https://kubernetes.default.svc." + p.Domain,
		"--service-account-key-file=" + p.PKI.SignerKey(), "--service-account-signing-key-file=" + p.PKI.SignerKey(),
		"--service-cluster-ip-range=" + p.ServiceCIDR, "--allow-privileged=true",
		"--kubelet-certificate-authority=" + p.PKI.Cert("ca"), "--kubelet-preferred-address-types=InternalIP",
		"--kubelet-client-certificate=" + p.PKI.Cert(LeafKubeletClient), "--kubelet-client-key=" + p.PKI.Key(LeafKubeletClient),
		"--requestheader-client-ca-file=" + p.PKI.Cert("front-proxy-ca"), "--requestheader-allowed-names=" + LeafFrontProxy,
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + p.PKI.Cert(LeafFrontProxy), "--proxy-client-key-file=" + p.PKI.Key(LeafFrontProxy),
		// One node's requests need no fair shares, and the machinery costs memory and seconds of an emulated start.
		"--enable-priority-and-fairness=false",
		"--profiling=false",
	}
}
