{{- /* Names, labels and small calculations that several templates need. The pods' common parts are in _pods.tpl. */ -}}

{{- /* Labels that never change for an object: selectors. A dict with root and component. */ -}}
{{- define "mesh.selector" -}}
app.kubernetes.io/name: mesh
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "mesh.labels" -}}
{{ include "mesh.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- /* Lays the dict `from` over the dict `into`. Sprig's mergeOverwrite would take 0, false and "" for "not given". */ -}}
{{- define "mesh.overlay" -}}
{{- $into := .into -}}
{{- range $key, $value := .from -}}
{{- if and (kindIs "map" $value) (kindIs "map" (get $into $key)) -}}
{{- include "mesh.overlay" (dict "into" (get $into $key) "from" $value) -}}
{{- else -}}
{{- $_ := set $into $key $value -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- /*
The image: a dict with root, and optionally override (a dict as values.image) and gpu. GPU images have a repository of
their own, not a tag: kustomize and mirrors set one tag, or one digest, for one repository.
*/ -}}
{{- define "mesh.image" -}}
{{- $image := deepCopy .root.Values.image -}}
{{- $own := .override | default dict -}}
{{- if .gpu -}}{{- $_ := set $image "repository" (printf "%s%s" $image.repository $image.gpuSuffix) -}}{{- end -}}
{{- if or .gpu $own.tag $own.repository -}}{{- $_ := set $image "digest" "" -}}{{- end -}}
{{- include "mesh.overlay" (dict "into" $image "from" $own) -}}
{{- $name := $image.repository -}}
{{- if $image.registry -}}{{- $name = printf "%s/%s" (trimSuffix "/" $image.registry) $name -}}{{- end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name ($image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end }}

{{- /* Bytes of a size such as 10Gi; the schema lets no other form through. */ -}}
{{- define "mesh.bytes" -}}
{{- $units := dict "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $unit := regexFind "[MGT]i$" . -}}
{{- mul (int64 (trimSuffix $unit .)) (int64 (get $units $unit)) -}}
{{- end }}

{{- define "mesh.internalSecret" -}}
{{- .Values.internalTLS.existingSecret | default "mesh-internal" -}}
{{- end }}

{{- /* The value of `mesh router --auth`, empty if it is off. YAML reads an unquoted off as false. */ -}}
{{- define "mesh.auth" -}}
{{- $mode := .Values.auth.mode | default "off" -}}
{{- if ne $mode "off" -}}{{- $mode -}}{{- end -}}
{{- end }}

{{- /* The value of `mesh router --auth-kubernetes`, empty if it is off. */ -}}
{{- define "mesh.serviceAccounts" -}}
{{- $mode := .Values.auth.serviceAccounts | default "off" -}}
{{- if ne $mode "off" -}}{{- $mode -}}{{- end -}}
{{- end }}

{{- define "mesh.adminKeySecret" -}}
{{- .Values.auth.existingSecret | default "mesh-admin-key" -}}
{{- end }}

{{- /* The Secret with the connection to etcd. The chart's own has a different name: an admin's Secret is never written. */ -}}
{{- define "mesh.etcdSecret" -}}
{{- ternary "mesh-etcd-connection" .Values.etcd.secretName .Values.etcd.embedded -}}
{{- end }}

{{- define "mesh.etcdScheme" -}}
{{- ternary "https" "http" .Values.internalTLS.enabled -}}
{{- end }}

{{- /* For each member of the embedded etcd one text, made from a format with the member's name twice or once. */ -}}
{{- define "mesh.etcdEndpoints" -}}
{{- $scheme := include "mesh.etcdScheme" . -}}
{{- $urls := list -}}
{{- range $member := until (int .Values.etcd.members) -}}
{{- $urls = append $urls (printf "%s://mesh-etcd-%d.mesh-etcd:2379" $scheme $member) -}}
{{- end -}}
{{- join "," $urls -}}
{{- end }}

{{- define "mesh.etcdCluster" -}}
{{- $scheme := include "mesh.etcdScheme" . -}}
{{- $members := list -}}
{{- range $member := until (int .Values.etcd.members) -}}
{{- $members = append $members (printf "mesh-etcd-%d=%s://mesh-etcd-%d.mesh-etcd:2380" $member $scheme $member) -}}
{{- end -}}
{{- join "," $members -}}
{{- end }}

{{- /* A pool's settings: those of all pools, and over them its own. YAML, for fromYaml. */ -}}
{{- define "mesh.pool" -}}
{{- $pool := deepCopy .root.Values.runtime -}}
{{- include "mesh.overlay" (dict "into" $pool "from" .pool) -}}
{{- if $pool.preset -}}
{{- $server := get (.root.Files.Get "files/presets.yaml" | fromYaml) $pool.preset -}}
{{- range $own := list $.root.Values.runtime.server $.pool.server -}}
{{- include "mesh.serverOverlay" (dict "into" $server "from" (deepCopy ($own | default dict))) -}}
{{- end -}}
{{- $_ := set $pool "server" $server -}}
{{- end -}}
{{- toYaml $pool -}}
{{- end }}

{{- /* Lays values of a server over others. Lists whose items have names are merged by the names. */ -}}
{{- define "mesh.serverOverlay" -}}
{{- range $key, $name := dict "env" "name" "ports" "name" "volumeMounts" "mountPath" "writable" "mountPath" -}}
{{- with get $.from $key -}}
{{- $own := list -}}
{{- range . -}}{{- $own = append $own (get . $name) -}}{{- end -}}
{{- $kept := list -}}
{{- range get $.into $key | default list -}}{{- if not (has (get . $name) $own) -}}{{- $kept = append $kept . -}}{{- end -}}{{- end -}}
{{- $_ := set $.from $key (concat $kept .) -}}
{{- end -}}
{{- end -}}
{{- include "mesh.overlay" . -}}
{{- end }}

{{- /* The user of a pool's server if it has one of its own, otherwise empty. A dict with root and server. */ -}}
{{- define "mesh.serverUser" -}}
{{- $agent := .root.Values.podSecurity.runAsUser -}}
{{- $user := (.server | default dict).runAsUser -}}
{{- if and $agent $user (ne (int64 $agent) (int64 $user)) -}}{{- int64 $user -}}{{- end -}}
{{- end }}

{{- /*
The line with a Deployment's replicas: a dict with root, name, and of (replicas and autoscaling of the values). If an
autoscaler or kubectl decides, it is the number that runs now: Kubernetes would read a field that an upgrade leaves out
as 1.
*/ -}}
{{- define "mesh.replicas" -}}
{{- $given := .of.replicas -}}
{{- if or .of.autoscaling.enabled (kindIs "invalid" $given) -}}
{{- $given = ternary .of.autoscaling.minReplicas nil .of.autoscaling.enabled -}}
{{- with lookup "apps/v1" "Deployment" .root.Release.Namespace .name -}}
{{- $given = .spec.replicas -}}
{{- end -}}
{{- end -}}
{{- if not (kindIs "invalid" $given) -}}
replicas: {{ int $given }}
{{- end -}}
{{- end }}
