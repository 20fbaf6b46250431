package bootstrap

import (
	"fmt"
	"slices"

	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	headersv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	earlyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/early_header_mutation/header_mutation/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/anypb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
)

// stripRequest takes our headers off every request before anything else reads it. ext_proc cannot do it: when ext_proc
// fails, what it would have stripped stays.
func stripRequest(cfg *configv1.Config) (*corev3.TypedExtensionConfig, error) {
	gone := []*mutationv3.HeaderMutation{removeOurs()}
	if !believesParents(cfg) {
		gone = append(gone, remove(HeaderParent))
	}
	packed, err := anypb.New(&earlyv3.HeaderMutation{Mutations: gone})
	if err != nil {
		return nil, fmt.Errorf("early header mutation: %w", err)
	}
	return &corev3.TypedExtensionConfig{Name: "knhk.strip", TypedConfig: packed}, nil
}

// receiptHeaders makes the response's x-knhk- headers ours alone: whatever the upstream sent under our prefix goes,
// then id and class come from the dynamic metadata that only the deciding filters set. It stands before them and so also
// covers our refusals and Envoy's own replies. A parent in a trailer nobody may tell.
func receiptHeaders(cfg *configv1.Config) (*hcmv3.HttpFilter, error) {
	return filter(filterHeaders, &headersv3.HeaderMutation{Mutations: &headersv3.Mutations{
		ResponseMutations: slices.Concat(
			[]*mutationv3.HeaderMutation{removeOurs()},
			fromMetadata(cfg, HeaderReceipt, MetadataReceipt),
			fromMetadata(cfg, HeaderClass, MetadataClass),
		),
		ResponseTrailersMutations: []*mutationv3.HeaderMutation{removeOurs()},
		RequestTrailersMutations:  []*mutationv3.HeaderMutation{removeOurs(), remove(HeaderParent)},
	}})
}

// localReplies puts id and class on the replies that Envoy makes itself, for those that go past the filters: in full capture
// the upstream's response may be waiting for knhk when knhk dies or hangs, and Envoy then replies directly to the client. There is
// nothing to remove: such a reply has no header of the upstream. Where the filters have run too, the value is the same.
func localReplies(cfg *configv1.Config) *hcmv3.LocalReplyConfig {
	return &hcmv3.LocalReplyConfig{Mappers: []*hcmv3.ResponseMapper{{
		// A mapper must have a filter: those that knhk has decided about.
		Filter: receiptFilter(cfg, &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_PresentMatch{PresentMatch: true}}),
		HeadersToAdd: append(metadataHeaders(cfg, HeaderReceipt, MetadataReceipt),
			metadataHeaders(cfg, HeaderClass, MetadataClass)...),
	}}}
}

func removeOurs() *mutationv3.HeaderMutation {
	return &mutationv3.HeaderMutation{Action: &mutationv3.HeaderMutation_RemoveOnMatch_{
		RemoveOnMatch: &mutationv3.HeaderMutation_RemoveOnMatch{
			KeyMatcher: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: HeaderPrefix}},
		}}}
}

func remove(header string) *mutationv3.HeaderMutation {
	return &mutationv3.HeaderMutation{Action: &mutationv3.HeaderMutation_Remove{Remove: header}}
}

func fromMetadata(cfg *configv1.Config, header, key string) []*mutationv3.HeaderMutation {
	var out []*mutationv3.HeaderMutation
	for _, h := range metadataHeaders(cfg, header, key) {
		out = append(out, &mutationv3.HeaderMutation{Action: &mutationv3.HeaderMutation_Append{Append: h}})
	}
	return out
}

// metadataHeaders sets a header to the value under key in the first namespace that has it. An absent value sets nothing.
func metadataHeaders(cfg *configv1.Config, header, key string) []*corev3.HeaderValueOption {
	var out []*corev3.HeaderValueOption
	how := corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD
	for _, ns := range namespaces(cfg) {
		out = append(out, &corev3.HeaderValueOption{
			Header:       &corev3.HeaderValue{Key: header, Value: "%DYNAMIC_METADATA(" + ns + ":" + key + ")%"},
			AppendAction: how,
		})
		how = corev3.HeaderValueOption_ADD_IF_ABSENT
	}
	return out
}
