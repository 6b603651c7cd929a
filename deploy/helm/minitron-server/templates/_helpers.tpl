{{- define "minitron.selector" -}}
app.kubernetes.io/name: minitron
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "minitron.labels" -}}
{{ include "minitron.selector" . }}
app.kubernetes.io/part-of: minitron
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "minitron.config" -}}
{{ .Values.config | toPrettyJson }}
{{- end }}

{{- define "minitron.resources" -}}
{{- $gpu := ternary (dict "nvidia.com/gpu" "1") (dict) .Values.gpu.enabled -}}
requests: {{ merge (dict) .Values.resources.requests $gpu | toJson }}
limits: {{ merge (dict) .Values.resources.limits $gpu | toJson }}
{{- end }}
