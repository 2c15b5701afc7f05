package cli

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
)

// listCommand is a command "ls", which lists things in a table, as JSON, or by
// their names alone.
func listCommand[M proto.Message](
	a *App, short, quietly string, ask func(context.Context, *client) (M, error), names func(M) []string, table func(M) error,
) *cobra.Command {
	var quiet bool
	c := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			m, err := ask(cmd.Context(), cl)
			switch {
			case err != nil:
				return err
			case a.json:
				return a.printJSON(m, false)
			case !quiet:
				return table(m)
			}
			for _, name := range names(m) {
				fmt.Fprintln(a.Out, name)
			}
			return nil
		},
	}
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, quietly)
	return c
}

// answerOf is what a response says.
func answerOf[M any](r *connect.Response[M], err error) (*M, error) {
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
